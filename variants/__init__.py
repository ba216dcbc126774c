"""What can stand in the place of one of the top level's parts: each file here is copied alone."""
