"""The training loop and what it needs: schedules, losses, metrics, events."""
