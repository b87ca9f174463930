"""Where a store lies: folders and buckets, their locks, and what of them may be read."""
