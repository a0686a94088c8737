"""Stores with a published model's shapes and random weights: how speed is measured where real weights cannot be had."""
