"""What bytes and documents mean: layouts, schemas, codecs, digests, commit records."""
