"""Online action detection: the MAT head on frozen features, by mmengine and mmaction2."""
