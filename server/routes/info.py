"""`GET /version` and `/info`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from softbatch.server.routes.common import engine_info, json_reply, services_of
from softbatch.server.schemas.base import ERROR_REPLIES
from softbatch.server.schemas.info import Info, Version
from softbatch.server.version import VERSION

router = APIRouter(tags=["server"], responses=ERROR_REPLIES)


@router.get("/version", response_model=Version, summary="Version of the server")
async def get_version() -> Response:
    return json_reply(Version(version=VERSION))


@router.get("/info", response_model=Info, summary="Model, limits and sizes")
async def get_info(request: Request) -> Response:
    """The names text-generation-inference uses, then our own."""
    services = services_of(request)
    settings, engine = services.settings, engine_info(services)
    model = engine.model
    return json_reply(
        Info(
            model_id=services.model_name,
            model_dtype=model.dtype,
            quantization=settings.quantization,
            kv_cache_dtype=settings.kv_cache_dtype,
            model_device_type=model.device,
            max_concurrent_requests=settings.max_batch_size + settings.max_queue_size,
            max_input_tokens=model.max_model_len - 1,
            max_total_tokens=model.max_model_len,
            default_max_tokens=settings.default_max_tokens,
            version=VERSION,
            slots=settings.max_batch_size,
            max_queue_size=settings.max_queue_size,
            max_batch_tokens=settings.max_batch_tokens,
            kv_blocks=engine.num_blocks,
            block_size=engine.block_size,
            attention=model.attention,
            num_parameters=model.num_parameters,
            model_fingerprint=model.fingerprint,
            max_soft_prompt_bytes=services.store.max_bytes,
        )
    )
