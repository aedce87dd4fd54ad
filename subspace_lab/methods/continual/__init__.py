"""Methods that learn a sequence of tasks."""
