"""The bytes on storage: the counterpart of docs/format.md. Pure; knows no torch, no files and no codec."""
