"""The teacher of a run that distils."""
