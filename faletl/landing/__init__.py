"""What fal sent, on a disk or in an object store, exactly as it came."""
