"""Whole recipes, run by name: ``lightning-bd fit --config NAME``."""
