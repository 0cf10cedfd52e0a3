"""How monitors run: what happens during one run of a Trainer, and when."""
