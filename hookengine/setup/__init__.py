"""What a Runner accepts, and what it becomes: arguments, state, description, answers."""
