"""The machine: device, files, images, batches, networks in training; knows no method and no run."""
