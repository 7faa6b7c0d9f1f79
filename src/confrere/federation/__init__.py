"""Sites, transports and the one round loop."""
