"""What the image terms of masked modelling predict."""
