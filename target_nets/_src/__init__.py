"""The inside of the package, one concern per file. Nothing here is public."""
