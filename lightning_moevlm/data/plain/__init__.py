"""Tars without a manifest, read through the webdataset library: training at once, with fewer promises."""
