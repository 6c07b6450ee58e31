"""Facts of a scene, questions about them, answers and their checks."""
