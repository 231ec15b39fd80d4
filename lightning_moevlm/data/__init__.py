"""WebDataset shards, from disk to batch.

`format/` parses tars and manifests, `storage/` opens shards of a folder or a server, `images/` and `text/` decode their
members. `read/` orders samples and makes batches, `plain/` draws them from tars without a manifest, and `load/` brings
them to the trainer. `write/` builds, converts and indexes sets, `inspect/` checks and shows them.
"""
