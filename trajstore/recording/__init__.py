"""Recording an experiment: its plan, what it costs, its iterates on their way to disk."""
