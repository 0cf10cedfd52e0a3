"""Looking into one ``nn.Module``, and leaving it as it was."""
