"""The one error of our own."""


class ConfigurationError(ValueError):
    """An argument, model or data set with which explaining cannot work, whatever the training does.

    It says what was expected, what came and what to do. Unlike the failure of an explanation, which never
    ends a training run, it is always raised, before the first batch is trained.

    Example:
        >>> from lightning_interp.layers import find_layer
        >>> find_layer(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), "1")
        Traceback (most recent call last):
        ...
        lightning_interp.errors.ConfigurationError: there is no layer '1' in Sequential...
    """
