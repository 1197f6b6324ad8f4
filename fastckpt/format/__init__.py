"""The bytes on storage: the twin of docs/format.md. Pure; knows no torch, no files and no codec."""
