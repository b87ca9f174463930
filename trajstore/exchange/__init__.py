"""What comes from elsewhere and goes there: exports, imports, merges, copies."""
