"""Training before training: tasks that need no labels, on the same network and the same volumes."""
