"""The frozen encoder inside other people's frameworks, one folder per task."""
