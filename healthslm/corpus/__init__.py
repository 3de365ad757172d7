"""From NCBI's files and others to a clean corpus in three splits."""
