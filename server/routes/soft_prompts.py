"""`/v1/soft_prompts`: register, list, show, download and delete trained soft prompts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from softbatch.prompt_store.manifest import SoftPromptError
from softbatch.prompt_store.stores.store import StoredPrompt
from softbatch.server.http.errors import ApiError
from softbatch.server.http.multipart import UPLOAD_BODY, read_upload, register
from softbatch.server.http.open_file import OpenFile
from softbatch.server.request_failures import UnknownSoftPrompt, shown, storage_failure
from softbatch.server.routes.common import json_reply, services_of
from softbatch.server.schemas.base import ERROR_REPLIES
from softbatch.server.schemas.soft_prompts import BrokenFile, SoftPromptDeleted, SoftPromptList, SoftPromptObject
from softbatch.server.services import Services

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/v1/soft_prompts", tags=["soft prompts"], responses=ERROR_REPLIES)
# Anything else that is wrong with a soft prompt is 422.
STATUS = {"unknown_prompt": 404, "name_taken": 409, "too_large": 413}


@router.post(
    "",
    status_code=201,
    response_model=SoftPromptObject,
    summary="Register a soft prompt",
    openapi_extra=UPLOAD_BODY,
)
async def create_soft_prompt(request: Request) -> Response:
    """Upload a soft prompt file, or an adapter trained by PEFT (PROMPT_TUNING, P_TUNING, CPT, PREFIX_TUNING,
    CARTRIDGE) as its two files or a zip of its folder.

    `curl -F name=manual -F file=@manual.safetensors http://127.0.0.1:8000/v1/soft_prompts`
    """
    services = services_of(request)
    with _store_errors():
        async with read_upload(request, services) as upload:
            stored = await asyncio.to_thread(register, services, upload)
    return json_reply(_object(services, stored, full=True), 201, headers={"Location": f"{router.prefix}/{stored.name}"})


@router.get("", response_model=SoftPromptList, summary="All soft prompts")
async def list_soft_prompts(request: Request) -> Response:
    """`broken` names files in the store that cannot be used, if there are any."""
    services = services_of(request)
    store = services.store
    stored = await asyncio.to_thread(store.list)
    broken = [BrokenFile(name=name, reason=why) for name, why in await asyncio.to_thread(store.broken)]
    return json_reply(SoftPromptList(data=[_object(services, prompt) for prompt in stored], broken=broken or None))


@router.get("/{name}", response_model=SoftPromptObject, summary="One soft prompt, with its fidelity")
async def get_soft_prompt(request: Request, name: str) -> Response:
    """`manifest` is what the file says about itself: context, training and measured fidelity."""
    services = services_of(request)
    return json_reply(_object(services, await _get(services, name), full=True))


@router.get("/{name}/content", response_class=FileResponse, summary="Download the file")
async def get_soft_prompt_content(request: Request, name: str) -> Response:
    """The `.safetensors` file, which any other softbatch server of the same model can register."""
    with _store_errors(name):
        stored, file = await asyncio.to_thread(services_of(request).store.open, name)
    headers = {"ETag": f'"{stored.sha256}"'}
    return OpenFile(file, f"{stored.name}.safetensors", "application/octet-stream", headers)


@router.delete("/{name}", response_model=SoftPromptDeleted, summary="Delete a soft prompt")
async def delete_soft_prompt(request: Request, name: str) -> Response:
    """Requests that use it are served to their end."""
    services = services_of(request)
    with _store_errors(name):
        await asyncio.to_thread(services.store.remove, name)
    await services.leases.release_deleted()
    return json_reply(SoftPromptDeleted(id=name))


async def _get(services: Services, name: str) -> StoredPrompt:
    with _store_errors(name):
        return await asyncio.to_thread(services.store.get, name)


@contextlib.contextmanager
def _store_errors(name: str | None = None) -> Iterator[None]:
    """Give the store's refusals their HTTP status."""
    try:
        yield
    except SoftPromptError as error:
        if error.code == "unknown_prompt" and name is not None:
            raise UnknownSoftPrompt(name) from error
        status = STATUS.get(error.code, 422)
        where = f"soft prompt {shown(name)}: " if name is not None else ""
        raise ApiError(status, f"{where}{error}", param=error.param, code=error.code) from error
    except OSError as error:
        logger.exception("the prompt store does not work")
        raise storage_failure(error) from error


def _object(services: Services, stored: StoredPrompt, full: bool = False) -> SoftPromptObject:
    manifest = stored.manifest
    return SoftPromptObject(
        id=stored.name,
        name=stored.name,
        created=stored.created_at,
        sha256=stored.sha256,
        bytes=stored.num_bytes,
        kind=manifest.kind,
        num_virtual_tokens=manifest.num_virtual_tokens,
        base_model=manifest.model.name,
        resident=stored.sha256 in services.engine.resident,
        context_tokens=manifest.context.num_tokens if manifest.context else None,
        preview=manifest.preview_of is not None,
        compression=manifest.preview_of,
        recall=stored.recall,
        verdict=verdict if isinstance(verdict := manifest.fidelity.get("verdict"), str) else None,
        kl_closed=_number(manifest.fidelity.get("kl_closed")),
        manifest=manifest if full else None,
    )


def _number(value: object) -> float | None:
    """What a file says of itself may be anything."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
