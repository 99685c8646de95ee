"""What needs a device: `make gpu` runs it where there is one, everywhere else it is skipped."""
