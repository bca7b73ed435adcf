"""Video question answering: a causal language model that sees through the frozen encoder."""
