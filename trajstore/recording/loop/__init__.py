"""Recording a user's own training loop."""
