"""What keeps a run alive or ends it with a reason: watchdog, node health, run lock, signals, restart policy."""
