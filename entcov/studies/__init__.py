"""Studies that can fail: what a control buys, measured by one command with choosing and reporting kept apart."""
