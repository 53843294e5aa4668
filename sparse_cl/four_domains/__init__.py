"""The reference script: domains learned one after another, forgetting measured (`sparse-cl run`)."""
