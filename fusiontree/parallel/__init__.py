"""How the model is laid out over devices."""
