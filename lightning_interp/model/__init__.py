"""Inspection of one ``nn.Module``, whose state is preserved. No Lightning."""
