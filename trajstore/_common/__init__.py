"""What every floor uses and none is about."""
