"""The legend of axis letters.

A tensor's name ends in its axes, one capital letter each, slowest first: `tokens_BSD` has shape
(batch, sequence, model width). A letter means the same in every file.

| letter | axis                                                                   |
|--------|------------------------------------------------------------------------|
| A      | modalities: image, text                                                |
| B      | batch: samples of one step on one device                               |
| C      | codes of a visual codebook                                             |
| D      | model width                                                            |
| E      | experts                                                                |
| F      | hidden width of a feed-forward                                         |
| G      | gradients whose norm is taken: tensors, and each matrix of a stack     |
| H      | attention heads                                                        |
| J      | the last optimiser steps, a window of them                             |
| K      | experts chosen per token                                               |
| L      | text positions                                                         |
| M      | masked positions                                                       |
| N      | routed pairs (token, expert)                                           |
| P      | image patches                                                          |
| Q      | numbers in one patch (channels x patch height x patch width)           |
| R      | colour channels (RGB)                                                  |
| S      | sequence: patches, then text                                           |
| T      | tokens: batch and sequence flattened                                   |
| U      | units of balance: groups of tokens whose load is evened out together   |
| V      | vocabulary                                                             |
| W      | width of one attention head                                            |
| X, Y   | image column, image row                                                |
| Z      | soft slots of one expert                                               |
"""
