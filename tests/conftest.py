from tests.storages import s3_server, storage

__all__ = ["s3_server", "storage"]
