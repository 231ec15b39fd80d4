"""The matrix of illnesses and cures: the share of each illness's damage that each cure undoes."""
