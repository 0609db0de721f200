"""Other people's implementations of this model, as instruments to test against. Nothing here uses our model."""
