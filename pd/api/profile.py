"""The profiler's two operations: what SGLang's `ProfileReq` asks, and what the runner answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from pd.api import answers
from pd.api.context import Context
from pd.api.http import Http
from pd.errors import RequestError
from pd.messages import ProfileWish, StartProfile, StopProfile
from pd.types import MAX_PROFILE_STEPS

#: SGLang's own profiler script sends numbers as text.
Digits: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[0-9]{1,15}$")]
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)] | Digits
#: Part of a file's name.
Name: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_.+=@:-]{0,64}$")]


class ProfileRequest(msgspec.Struct, kw_only=True):
    """`num_steps` 0 or none: until it is stopped. `profile_by_stage`: prefill and decode steps in a trace each."""

    activities: list[Literal["CPU", "GPU"]] | None = None
    output_dir: Annotated[str, msgspec.Meta(max_length=4096)] | None = None
    num_steps: Number | None = None
    start_step: Number | None = None
    profile_by_stage: bool | None = None
    profile_stages: list[Literal["prefill", "decode"]] | None = None
    with_stack: bool | None = None
    record_shapes: bool | None = None
    profile_prefix: Name | None = None
    profile_id: Name | None = None
    merge_profiles: bool | None = None
    detailed_annotations: bool | None = None


class Profiles:
    """Endpoints."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._request = msgspec.json.Decoder(ProfileRequest)

    async def start(self, http: Http) -> None:
        wish = _wish(await http.json(self._request, self.context.limits.body_bytes, empty=b"{}"))
        await self._ask(lambda token: StartProfile(token, wish))
        await http.respond_json(200, answers.ProfileAnswer(message="profiling has started"))

    async def stop(self, http: Http) -> None:
        """Answered when the traces are on disk."""
        files = (await self._ask(StopProfile))["files"]
        await http.respond_json(200, answers.ProfileAnswer(message="profiling has stopped", files=files))

    async def _ask(self, make: Any) -> dict[str, Any]:
        answer = await self.context.engine.command(make, "profile", self.context.limits.profile_s)
        if answer["problem"]:
            status: int = answer["status"]
            kind = "invalid_request_error" if status < 500 else "server_error"
            param = answer["param"] or None
            raise RequestError(answer["problem"], status=status, param=param, kind=kind, code="profile")
        return answer


def _wish(request: ProfileRequest) -> ProfileWish:
    """Raises RequestError for what would not act."""
    steps, stages = int(request.num_steps or 0), request.profile_stages
    if steps > MAX_PROFILE_STEPS:
        raise RequestError(f"num_steps must be at most {MAX_PROFILE_STEPS}, got {steps}", param="num_steps")
    if stages is not None and not request.profile_by_stage:
        raise RequestError("profile_stages acts with profile_by_stage only", param="profile_stages")
    if request.merge_profiles:
        raise RequestError("merge_profiles: an instance has one rank, whose trace is all", param="merge_profiles")
    if request.detailed_annotations:
        raise RequestError("detailed_annotations are not built", param="detailed_annotations")
    if request.activities == []:
        raise RequestError("activities must name CPU or GPU", param="activities")
    return ProfileWish(
        activities=tuple(request.activities or ()),
        output_dir=request.output_dir or "",
        num_steps=steps,
        start_step=int(request.start_step or 0),
        stages=tuple(stages or ("prefill", "decode")) if request.profile_by_stage else (),
        with_stack=bool(request.with_stack),
        record_shapes=request.record_shapes is not False,
        prefix=request.profile_prefix or "",
        id=request.profile_id or "",
    )
