from distillery.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_INTERACTIVE: _ClassVar[Priority]
    PRIORITY_BULK: _ClassVar[Priority]

class RenderOutput(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RENDER_OUTPUT_UNSPECIFIED: _ClassVar[RenderOutput]
    RENDER_OUTPUT_RGB: _ClassVar[RenderOutput]
    RENDER_OUTPUT_DEPTH: _ClassVar[RenderOutput]
    RENDER_OUTPUT_OPACITY: _ClassVar[RenderOutput]
    RENDER_OUTPUT_NORMAL: _ClassVar[RenderOutput]
PRIORITY_UNSPECIFIED: Priority
PRIORITY_INTERACTIVE: Priority
PRIORITY_BULK: Priority
RENDER_OUTPUT_UNSPECIFIED: RenderOutput
RENDER_OUTPUT_RGB: RenderOutput
RENDER_OUTPUT_DEPTH: RenderOutput
RENDER_OUTPUT_OPACITY: RenderOutput
RENDER_OUTPUT_NORMAL: RenderOutput

class GenerateRequest(_message.Message):
    __slots__ = ("model", "class_labels", "prompts", "count", "seed", "seeds", "num_steps", "guidance", "image_format", "with_tensor", "priority", "image", "negative_prompts", "negative_scale")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CLASS_LABELS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FORMAT_FIELD_NUMBER: _ClassVar[int]
    WITH_TENSOR_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_SCALE_FIELD_NUMBER: _ClassVar[int]
    model: str
    class_labels: _containers.RepeatedScalarFieldContainer[int]
    prompts: _containers.RepeatedScalarFieldContainer[str]
    count: int
    seed: int
    seeds: _containers.RepeatedScalarFieldContainer[int]
    num_steps: int
    guidance: float
    image_format: _common_pb2.ImageFormat
    with_tensor: bool
    priority: Priority
    image: ImageInput
    negative_prompts: _containers.RepeatedScalarFieldContainer[str]
    negative_scale: float
    def __init__(self, model: _Optional[str] = ..., class_labels: _Optional[_Iterable[int]] = ..., prompts: _Optional[_Iterable[str]] = ..., count: _Optional[int] = ..., seed: _Optional[int] = ..., seeds: _Optional[_Iterable[int]] = ..., num_steps: _Optional[int] = ..., guidance: _Optional[float] = ..., image_format: _Optional[_Union[_common_pb2.ImageFormat, str]] = ..., with_tensor: _Optional[bool] = ..., priority: _Optional[_Union[Priority, str]] = ..., image: _Optional[_Union[ImageInput, _Mapping]] = ..., negative_prompts: _Optional[_Iterable[str]] = ..., negative_scale: _Optional[float] = ...) -> None: ...

class ImageInput(_message.Message):
    __slots__ = ("image", "mask", "strength", "upscale")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    UPSCALE_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    mask: bytes
    strength: float
    upscale: bool
    def __init__(self, image: _Optional[bytes] = ..., mask: _Optional[bytes] = ..., strength: _Optional[float] = ..., upscale: _Optional[bool] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("images", "tensor", "summary")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[_common_pb2.Image]
    tensor: _common_pb2.FloatTensor
    summary: GenerateSummary
    def __init__(self, images: _Optional[_Iterable[_Union[_common_pb2.Image, _Mapping]]] = ..., tensor: _Optional[_Union[_common_pb2.FloatTensor, _Mapping]] = ..., summary: _Optional[_Union[GenerateSummary, _Mapping]] = ...) -> None: ...

class GenerateStreamRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: GenerateRequest
    def __init__(self, request: _Optional[_Union[GenerateRequest, _Mapping]] = ...) -> None: ...

class GenerateStreamResponse(_message.Message):
    __slots__ = ("image", "summary")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    image: _common_pb2.Image
    summary: GenerateSummary
    def __init__(self, image: _Optional[_Union[_common_pb2.Image, _Mapping]] = ..., summary: _Optional[_Union[GenerateSummary, _Mapping]] = ...) -> None: ...

class GenerateSummary(_message.Message):
    __slots__ = ("model", "backend", "count", "num_steps", "guidance", "seconds", "cut_prompts", "prompt_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    CUT_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    backend: str
    count: int
    num_steps: int
    guidance: float
    seconds: float
    cut_prompts: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    def __init__(self, model: _Optional[str] = ..., backend: _Optional[str] = ..., count: _Optional[int] = ..., num_steps: _Optional[int] = ..., guidance: _Optional[float] = ..., seconds: _Optional[float] = ..., cut_prompts: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class Orbit(_message.Message):
    __slots__ = ("azimuth_degrees", "elevation_degrees", "radius", "target")
    AZIMUTH_DEGREES_FIELD_NUMBER: _ClassVar[int]
    ELEVATION_DEGREES_FIELD_NUMBER: _ClassVar[int]
    RADIUS_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    azimuth_degrees: float
    elevation_degrees: float
    radius: float
    target: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, azimuth_degrees: _Optional[float] = ..., elevation_degrees: _Optional[float] = ..., radius: _Optional[float] = ..., target: _Optional[_Iterable[float]] = ...) -> None: ...

class Pose(_message.Message):
    __slots__ = ("matrix",)
    MATRIX_FIELD_NUMBER: _ClassVar[int]
    matrix: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, matrix: _Optional[_Iterable[float]] = ...) -> None: ...

class Intrinsics(_message.Message):
    __slots__ = ("fx", "fy", "cx", "cy")
    FX_FIELD_NUMBER: _ClassVar[int]
    FY_FIELD_NUMBER: _ClassVar[int]
    CX_FIELD_NUMBER: _ClassVar[int]
    CY_FIELD_NUMBER: _ClassVar[int]
    fx: float
    fy: float
    cx: float
    cy: float
    def __init__(self, fx: _Optional[float] = ..., fy: _Optional[float] = ..., cx: _Optional[float] = ..., cy: _Optional[float] = ...) -> None: ...

class Lens(_message.Message):
    __slots__ = ("distortion", "fisheye")
    DISTORTION_FIELD_NUMBER: _ClassVar[int]
    FISHEYE_FIELD_NUMBER: _ClassVar[int]
    distortion: _containers.RepeatedScalarFieldContainer[float]
    fisheye: bool
    def __init__(self, distortion: _Optional[_Iterable[float]] = ..., fisheye: _Optional[bool] = ...) -> None: ...

class ViewOptions(_message.Message):
    __slots__ = ("width", "height", "fov_degrees", "intrinsics", "background", "outputs", "image_format", "priority", "progressive", "lens")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    FOV_DEGREES_FIELD_NUMBER: _ClassVar[int]
    INTRINSICS_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FORMAT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PROGRESSIVE_FIELD_NUMBER: _ClassVar[int]
    LENS_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    fov_degrees: float
    intrinsics: Intrinsics
    background: _containers.RepeatedScalarFieldContainer[float]
    outputs: _containers.RepeatedScalarFieldContainer[RenderOutput]
    image_format: _common_pb2.ImageFormat
    priority: Priority
    progressive: bool
    lens: Lens
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., fov_degrees: _Optional[float] = ..., intrinsics: _Optional[_Union[Intrinsics, _Mapping]] = ..., background: _Optional[_Iterable[float]] = ..., outputs: _Optional[_Iterable[_Union[RenderOutput, str]]] = ..., image_format: _Optional[_Union[_common_pb2.ImageFormat, str]] = ..., priority: _Optional[_Union[Priority, str]] = ..., progressive: _Optional[bool] = ..., lens: _Optional[_Union[Lens, _Mapping]] = ...) -> None: ...

class RenderRequest(_message.Message):
    __slots__ = ("model", "pose", "orbit", "options")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    POSE_FIELD_NUMBER: _ClassVar[int]
    ORBIT_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    pose: Pose
    orbit: Orbit
    options: ViewOptions
    def __init__(self, model: _Optional[str] = ..., pose: _Optional[_Union[Pose, _Mapping]] = ..., orbit: _Optional[_Union[Orbit, _Mapping]] = ..., options: _Optional[_Union[ViewOptions, _Mapping]] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("top", "rows", "factor", "last")
    TOP_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    top: int
    rows: int
    factor: int
    last: bool
    def __init__(self, top: _Optional[int] = ..., rows: _Optional[int] = ..., factor: _Optional[int] = ..., last: _Optional[bool] = ...) -> None: ...

class View(_message.Message):
    __slots__ = ("index", "rgb", "depth", "opacity", "normal", "region")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    RGB_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    OPACITY_FIELD_NUMBER: _ClassVar[int]
    NORMAL_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    index: int
    rgb: _common_pb2.Image
    depth: _common_pb2.FloatTensor
    opacity: _common_pb2.FloatTensor
    normal: _common_pb2.FloatTensor
    region: Region
    def __init__(self, index: _Optional[int] = ..., rgb: _Optional[_Union[_common_pb2.Image, _Mapping]] = ..., depth: _Optional[_Union[_common_pb2.FloatTensor, _Mapping]] = ..., opacity: _Optional[_Union[_common_pb2.FloatTensor, _Mapping]] = ..., normal: _Optional[_Union[_common_pb2.FloatTensor, _Mapping]] = ..., region: _Optional[_Union[Region, _Mapping]] = ...) -> None: ...

class RenderResponse(_message.Message):
    __slots__ = ("view", "summary")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    view: View
    summary: RenderSummary
    def __init__(self, view: _Optional[_Union[View, _Mapping]] = ..., summary: _Optional[_Union[RenderSummary, _Mapping]] = ...) -> None: ...

class RenderSummary(_message.Message):
    __slots__ = ("model", "backend", "count", "seconds")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    backend: str
    count: int
    seconds: float
    def __init__(self, model: _Optional[str] = ..., backend: _Optional[str] = ..., count: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class OrbitPath(_message.Message):
    __slots__ = ("count", "start", "degrees")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    DEGREES_FIELD_NUMBER: _ClassVar[int]
    count: int
    start: Orbit
    degrees: float
    def __init__(self, count: _Optional[int] = ..., start: _Optional[_Union[Orbit, _Mapping]] = ..., degrees: _Optional[float] = ...) -> None: ...

class PosePath(_message.Message):
    __slots__ = ("poses",)
    POSES_FIELD_NUMBER: _ClassVar[int]
    poses: _containers.RepeatedCompositeFieldContainer[Pose]
    def __init__(self, poses: _Optional[_Iterable[_Union[Pose, _Mapping]]] = ...) -> None: ...

class RenderPathRequest(_message.Message):
    __slots__ = ("model", "orbit", "poses", "options")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ORBIT_FIELD_NUMBER: _ClassVar[int]
    POSES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    orbit: OrbitPath
    poses: PosePath
    options: ViewOptions
    def __init__(self, model: _Optional[str] = ..., orbit: _Optional[_Union[OrbitPath, _Mapping]] = ..., poses: _Optional[_Union[PosePath, _Mapping]] = ..., options: _Optional[_Union[ViewOptions, _Mapping]] = ...) -> None: ...

class RenderPathResponse(_message.Message):
    __slots__ = ("view", "summary")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    view: View
    summary: RenderSummary
    def __init__(self, view: _Optional[_Union[View, _Mapping]] = ..., summary: _Optional[_Union[RenderSummary, _Mapping]] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("model", "function", "inputs", "priority")
    class InputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _common_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    model: str
    function: str
    inputs: _containers.MessageMap[str, _common_pb2.Tensor]
    priority: Priority
    def __init__(self, model: _Optional[str] = ..., function: _Optional[str] = ..., inputs: _Optional[_Mapping[str, _common_pb2.Tensor]] = ..., priority: _Optional[_Union[Priority, str]] = ...) -> None: ...

class PredictResponse(_message.Message):
    __slots__ = ("outputs", "summary")
    class OutputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _common_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ...) -> None: ...
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.MessageMap[str, _common_pb2.Tensor]
    summary: PredictSummary
    def __init__(self, outputs: _Optional[_Mapping[str, _common_pb2.Tensor]] = ..., summary: _Optional[_Union[PredictSummary, _Mapping]] = ...) -> None: ...

class PredictSummary(_message.Message):
    __slots__ = ("model", "backend", "count", "seconds")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    backend: str
    count: int
    seconds: float
    def __init__(self, model: _Optional[str] = ..., backend: _Optional[str] = ..., count: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...
