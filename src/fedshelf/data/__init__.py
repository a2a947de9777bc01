"""Photos on a store's disk: folders, catalogue, decode cache, augmentation, partitions, health."""
