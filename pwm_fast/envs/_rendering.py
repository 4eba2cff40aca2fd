"""Pictures of envs: of MuJoCo's, drawn here, and of those that draw themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from pwm_fast.envs import _answers, _gl
from pwm_fast.envs.protocol import CannotRender
from pwm_fast.envs.tasks.base import Task

# The camera of a robot: on its right and behind, at so many extents of the robot.
AZIMUTH, ELEVATION, DISTANCE = 68.0, -18.0, 2.2
ROBOT, RAIL = (0.90, 0.48, 0.16, 1.0), (0.75, 0.77, 0.80, 1.0)
SKY, HORIZON = (0.45, 0.60, 0.80), (0.90, 0.93, 0.97)
FLOOR = (0.26, 0.33, 0.42), (0.34, 0.42, 0.52)
DEFAULT_RATE = 30.0  # control steps a second of an env that does not say
MAX_GEOMS = 10_000  # of a scene: mujoco.Renderer's

# (model, data, camera) of an env, up to date with its state.
Look = Callable[[int], tuple[Any, Any, Any]]


class MujocoViewer:
    """Draws envs off-screen with MuJoCo; implements :class:`pwm_fast.envs.protocol.Viewer`.

    Nothing that the physics reads is written to.

    Args:
        look: what is to be drawn of an env.
        step_seconds: of a control step.
        width: of a picture, pixels.
        height: likewise.

    Raises:
        CannotRender: there is no OpenGL.
    """

    def __init__(self, look: Look, step_seconds: float, width: int, height: int) -> None:
        import mujoco

        self._mujoco = mujoco
        self.step_seconds = step_seconds
        self._look = look
        # By its id each model, with its scene and what of it is on the GPU.
        self._made: dict[int, tuple[Any, Any, Any]] = {}
        self._option, self._pert = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._rect = mujoco.MjrRect(0, 0, width, height)
        self._pixels = np.empty((height, width, 3), dtype=np.uint8)
        self._context: Any = _gl.context(width, height)

    def frame(self, env: int) -> np.ndarray:
        """See the protocol."""
        mujoco = self._mujoco
        model, data, camera = self._look(env)
        self._context.make_current()  # the env may have one of its own
        if id(model) not in self._made:
            self._made[id(model)] = model, *self._resources(model)
        _, scene, drawn = self._made[id(model)]
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, drawn)  # not another's
        mujoco.mjv_updateScene(
            model, data, self._option, self._pert, camera, mujoco.mjtCatBit.mjCAT_ALL, scene
        )
        mujoco.mjr_render(self._rect, scene, drawn)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, drawn)
        return self._pixels[::-1].copy()  # OpenGL's rows begin at the bottom

    def close(self) -> None:
        """See the protocol."""
        if self._context is not None:
            self._context.make_current()
            for _, _, drawn in self._made.values():
                drawn.free()
            self._made.clear()
            self._context.free()
            self._context = None

    def _resources(self, model: Any) -> tuple[Any, Any]:
        """A scene of a model, and what of it is on the GPU."""
        mujoco, whole = self._mujoco, model.vis.global_
        size = whole.offwidth, whole.offheight
        # The model's size of the off-screen buffer counts, which is made here.
        whole.offwidth, whole.offheight = self._rect.width, self._rect.height
        try:
            context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        except mujoco.FatalError as error:  # GLFW says nothing before
            raise _gl.unusable(error) from error
        finally:
            whole.offwidth, whole.offheight = size
        return mujoco.MjvScene(model, MAX_GEOMS), context


class OwnViewer:
    """Asks envs for pictures of their own; implements :class:`pwm_fast.envs.protocol.Viewer`.

    Args:
        render: what an env answers.
        name: of the environment, for messages.
        step_seconds: of a control step.
        width: to which pictures are scaled, their proportions kept, with black on the rest.
        height: likewise.
    """

    def __init__(
        self,
        render: Callable[[int], Any],
        name: str,
        step_seconds: float,
        width: int,
        height: int,
    ) -> None:
        _gl.choose()  # it may be MuJoCo that they draw with
        self._render, self._name, self._size = render, name, (width, height)
        self.step_seconds = step_seconds

    def frame(self, env: int) -> np.ndarray:
        """See the protocol."""
        try:
            picture = self._render(env)
        except Exception as error:
            raise CannotRender(f"{self._name}: render(): {_answers.said(error)}") from error
        if isinstance(picture, Tensor):
            picture = picture.cpu().numpy()
        fits = isinstance(picture, np.ndarray) and picture.dtype == np.uint8
        if not fits or picture.ndim != 3 or picture.shape[2] != 3:
            raise CannotRender(
                f"{self._name}: render() must give a picture of bytes [height, width, 3], as with "
                f"render_mode=rgb_array, got {_answers.shown(picture)}"
            )
        if picture.shape[1::-1] == self._size:
            return np.array(picture)
        from PIL import Image, ImageOps

        return np.array(ImageOps.pad(Image.fromarray(picture), self._size))

    def close(self) -> None:
        """See the protocol."""


def of_robot(task: Task, qpos: Tensor, width: int, height: int) -> MujocoViewer:
    """A viewer of the envs of a built-in robot, whose camera goes along with it.

    Args:
        task: the robot.
        qpos: view ``[N, nq]`` of the envs' coordinates.
        width: of a picture, pixels.
        height: likewise.

    Raises:
        CannotRender: there is no OpenGL.
    """
    import mujoco

    spec = task.spec()
    extent = spec.compile().stat.extent  # without the floor and the rail that are put in here
    root = spec.worldbody.first_body()
    _furnish(spec, root, extent)
    model = spec.compile()
    data = mujoco.MjData(model)
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_TRACKING
    camera.trackbodyid = 1  # the root, which may have no name
    camera.azimuth, camera.elevation, camera.distance = AZIMUTH, ELEVATION, DISTANCE * extent

    def look(env: int) -> tuple[Any, Any, Any]:
        data.qpos[:] = qpos[env].cpu().numpy()
        for update in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_camlight):
            update(model, data)
        return model, data, camera

    return MujocoViewer(look, task.control_dt, width, height)


def _furnish(spec: Any, root: Any, extent: float) -> None:
    """Put colours, a light, a sky and a floor into the model of a robot, to be looked at alone."""
    import mujoco

    checker, gradient = mujoco.mjtBuiltin.mjBUILTIN_CHECKER, mujoco.mjtBuiltin.mjBUILTIN_GRADIENT
    plane = mujoco.mjtGeom.mjGEOM_PLANE
    world = spec.worldbody
    for geom in spec.geoms:
        geom.rgba = ROBOT
    floor = next((geom for geom in spec.geoms if geom.type == plane), None)
    if floor is None:
        floor = world.add_geom(type=plane, size=(0, 0, 1), pos=(0, 0, -0.9 * extent))
    floor.rgba, floor.material = (1.0, 1.0, 1.0, 1.0), "pwm_fast_floor"
    for joint in root.joints:
        limited = joint.limited and joint.range[0] < joint.range[1]  # the first may be "auto"
        if joint.type == mujoco.mjtJoint.mjJNT_SLIDE and limited:  # as the cart-pole's
            ends = [joint.axis * end for end in joint.range]
            capsule = mujoco.mjtGeom.mjGEOM_CAPSULE
            size = (0.02 * extent, 0, 0)
            world.add_geom(type=capsule, fromto=np.concatenate(ends), size=size, rgba=RAIL)
    names = {"name": "pwm_fast_floor", "rgb1": FLOOR[0], "rgb2": FLOOR[1]}
    pixels = {"width": 256, "height": 256}
    flat, sky = mujoco.mjtTexture.mjTEXTURE_2D, mujoco.mjtTexture.mjTEXTURE_SKYBOX
    spec.add_texture(type=flat, builtin=checker, **names, **pixels)
    spec.add_texture(type=sky, builtin=gradient, rgb1=SKY, rgb2=HORIZON, **pixels)
    material = spec.add_material(name="pwm_fast_floor", texuniform=True, texrepeat=(0.5, 0.5))
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "pwm_fast_floor"
    root.add_light(  # goes along, so that the shadow is always there
        type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
        mode=mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM,
        pos=(-0.6 * extent, -0.8 * extent, 2.0 * extent),
        dir=(0.3, 0.4, -1.0),
        diffuse=(0.6,) * 3,
        specular=(0.2,) * 3,
        castshadow=True,
    )
    spec.visual.map.shadowclip = 3.0  # the default of 1 leaves speckles beside the robot
    spec.visual.quality.shadowsize = 1024  # of 4096, which takes Mesa twice as long on a CPU
    light = spec.visual.headlight
    light.ambient, light.diffuse, light.specular = (0.35,) * 3, (0.35,) * 3, (0.1,) * 3
