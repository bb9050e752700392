"""Export an artifact to CoreML shards for the Neural Engine, check them, and run them anywhere."""
