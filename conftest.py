"""What every test, and every example in a docstring, runs under."""
