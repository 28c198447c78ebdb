"""Landing: pages exactly as fal sent them, on a disk or in an object store."""
