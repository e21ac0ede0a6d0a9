"""A call by name and JSON, as grpcurl makes it: the server describes its messages, nothing of ours is imported.

python examples/reflection.py HOST:PORT package.Service/Method '{"model": "dmd2-digits", "classLabels": [7]}'
"""

import sys
from collections.abc import Iterator

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


def call(address: str, method: str, request: str = "{}") -> Iterator[str]:
    """The answers of `package.Service/Method` to a request in JSON, as JSON."""
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service, _, name = method.partition("/")
        found = pool.FindServiceByName(service).FindMethodByName(name)
        message = json_format.Parse(request, GetMessageClass(found.input_type)(), descriptor_pool=pool)
        kind = channel.unary_stream if found.server_streaming else channel.unary_unary
        ask = kind(
            f"/{method}", type(message).SerializeToString, GetMessageClass(found.output_type).FromString
        )
        for reply in ask(message) if found.server_streaming else [ask(message)]:
            yield json_format.MessageToJson(reply, descriptor_pool=pool)


if __name__ == "__main__":
    for answer in call(*sys.argv[1:]):
        print(answer)
