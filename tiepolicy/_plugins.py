"""Step 29, plugins: which ones the default policy found, and where they come from."""

from dataclasses import dataclass
from importlib import metadata

import pluggy

from tiepolicy._policy import default_policy
from tiepolicy.errors import PluginError
from tiepolicy.hookspecs import PROJECT


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """One plugin of the default policy."""

    name: str
    module: str
    #: The hooks that it implements, sorted.
    hooks: tuple[str, ...]
    #: What was installed to get it.
    distribution: str
    #: Empty where the distribution runs from its sources, without being installed.
    version: str


def installed_plugins() -> list[Plugin]:
    """The plugins of the default policy, sorted by name.

    Raises:
        PluginError: If one cannot be loaded.
    """
    try:
        manager = default_policy()._manager  # noqa: SLF001 - ours; a policy shows no plugin manager to its users
    except Exception as error:  # a plugin runs its own code when it is imported
        raise PluginError(
            f"an installed plugin cannot be loaded, {type(error).__name__}: {error}. Update or uninstall it"
        ) from error
    origins = {id(plugin): distribution for plugin, distribution in manager.list_plugin_distinfo()}
    return sorted(
        (
            _describe(manager, name, plugin, origins.get(id(plugin)))
            for name, plugin in manager.list_name_plugin()
            if plugin is not None
        ),
        key=lambda plugin: plugin.name,
    )


def _describe(manager: pluggy.PluginManager, name: str, plugin: object, origin: object) -> Plugin:
    distribution = getattr(origin, "project_name", "") or PROJECT
    return Plugin(
        name=name,
        module=getattr(plugin, "__name__", None) or type(plugin).__module__,
        hooks=tuple(sorted(caller.name for caller in manager.get_hookcallers(plugin) or ())),
        distribution=distribution,
        version=_version(distribution),
    )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
