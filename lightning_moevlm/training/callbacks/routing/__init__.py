"""Callbacks that hold how a model routes against how it routes elsewhere or later."""
