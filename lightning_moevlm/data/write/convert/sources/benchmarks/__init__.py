"""Reads the published files of benchmarks: captions, questions with answers, statements about two images."""
