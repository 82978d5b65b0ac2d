/**
 * The part of Auth0's Management API that `npm run setup` uses, on the settings of the stand-in tenant: what is
 * written here decides how the tenant's other endpoints answer.
 *
 * NOT FOR PRODUCTION: a token's signature is not verified. Paths, fields and errors are those of Auth0's SDK (npm
 * `auth0` 7.1); other answers, and messages that nobody has quoted, are worded by this project. Left out:
 * rate limits, and every field that setup does not look at.
 */
import { randomUUID } from "node:crypto";
import { decodeJwt } from "jose";
import { z } from "zod";
import { ACTION_CODE, type Api, type Application, type TenantSettings } from "./tenant-settings.ts";

type Json = object;

interface Call {
  settings: TenantSettings;
  query: URLSearchParams;
  /** The value of `{id}` in the path. */
  id: string;
  body: unknown;
  importFromUrl: (url: string) => Promise<void>;
}

/** Each route of the API: the scope that it asks of the token, and what it does. */
const ROUTES: Record<string, [scope: string, answer: (call: Call) => unknown]> = {
  "GET resource-servers": ["read:resource_servers", (call) => list(call, API, call.settings.apis)],
  "POST resource-servers": ["create:resource_servers", createApi],
  "PATCH resource-servers/{id}": ["update:resource_servers", (call) => change(call, API, call.settings.apis)],
  "GET client-grants": ["read:client_grants", (call) => page(call, grantsOf(call.settings), "client_grants")],
  "POST client-grants": ["create:client_grants", createGrant],
  "GET tenants/settings": ["read:tenant_settings", ({ settings }) => show(TENANT, settings)],
  "PATCH tenants/settings": ["update:tenant_settings", ({ settings, body }) => fill(TENANT, settings, body)],
  "GET clients": ["read:clients", (call) => list(call, CLIENT, call.settings.applications)],
  "POST clients/cimd/register": ["create:clients", importClient],
  "GET connections": ["read:connections", (call) => list(call, CONNECTION, call.settings.connections, "connections")],
  "PATCH connections/{id}": ["update:connections", (call) => change(call, CONNECTION, call.settings.connections)],
  "GET actions/actions": [
    "read:actions",
    (call) => page(call, library(call.settings).actions.map(showAction), "actions"),
  ],
  "GET actions/actions/{id}": ["read:actions", readAction],
  "POST actions/actions": ["create:actions", createAction],
  "POST actions/actions/{id}/deploy": ["update:actions", deployAction],
  "GET actions/triggers/post-login/bindings": [
    "read:actions",
    (call) => page(call, library(call.settings).flow, "bindings"),
  ],
  "PATCH actions/triggers/post-login/bindings": ["update:actions", updateBindings],
};

/** All that setup needs. */
export const MANAGEMENT_SCOPES = [...new Set(Object.values(ROUTES).map(([scope]) => scope))];

/** @param request Method, URL and body of a request under `/api/v2/`. */
export async function answerManagement(
  settings: TenantSettings,
  importFromUrl: Call["importFromUrl"],
  request: { method: string; url: URL; authorization: string; body: string },
): Promise<Response> {
  const { method, url, authorization, body } = request;
  try {
    for (const [route, [scope, answer]] of Object.entries(ROUTES)) {
      const pattern = new RegExp(`^${route.replace("{id}", "(?<id>[^/]+)")}$`);
      const match = pattern.exec(`${method} ${url.pathname.replace("/api/v2/", "")}`);
      if (!match) continue;
      if (!readScopes(authorization, url).includes(scope)) {
        throw refusal(403, "insufficient_scope", `Insufficient scope, expected any of: ${scope}`);
      }
      const id = decodeURIComponent(match.groups?.id ?? "");
      const call = { settings, query: url.searchParams, id, body: body ? JSON.parse(body) : undefined, importFromUrl };
      return Response.json(await answer(call), { status: method === "POST" ? 201 : 200 });
    }
    return refusal(404, "not_found", "Not Found");
  } catch (error) {
    return error instanceof Response ? error : refusal(400, "invalid_body", `Payload validation error: '${error}'`);
  }
}

const refusal = (statusCode: number, errorCode: string, message: string) =>
  Response.json({ statusCode, errorCode, message }, { status: statusCode });

/** The scopes of a token for this tenant's Management API. */
function readScopes(authorization: string, url: URL): string[] {
  const { aud, exp = 0, scope } = decodeJwt(authorization.replace("Bearer ", ""));
  if (aud !== new URL("/api/v2/", url).href || exp * 1_000 < Date.now()) {
    throw refusal(401, "invalid_token", "Invalid token");
  }
  return String(scope).split(" ");
}

// ------------------------------------------------------------------------ Auth0's JSON of the tenant's settings

/** For each field of an item, how to read it, and how to change it where that is possible. */
type Fields<T> = Record<string, Field<T>>;
type Field<T> = [show: (item: T) => unknown, take?: (item: T, value: unknown) => unknown];

const onOff = <Key extends string>(key: Key): Field<Record<Key, boolean>> => [
  (item) => item[key],
  (item, isOn) => Object.assign(item, { [key]: z.boolean().parse(isOn) }),
];

const FLAGS: Fields<TenantSettings> = { enable_dynamic_client_registration: onOff("dynamicClientRegistration") };

const TENANT: Fields<TenantSettings> = {
  default_audience: [(tenant) => tenant.defaultAudience],
  resource_parameter_profile: [
    (tenant) => tenant.resourceParameterCompatibilityProfile ? "compatibility" : "audience",
    (tenant, profile) => tenant.resourceParameterCompatibilityProfile = profile === "compatibility",
  ],
  flags: [(tenant) => show(FLAGS, tenant), (tenant, flags) => fill(FLAGS, tenant, flags)],
  dynamic_client_registration_security_mode: [(tenant) => tenant.kind],
  client_id_metadata_document_supported: onOff("clientIdMetadataDocumentRegistration"),
  authorization_response_iss_parameter_supported: onOff("includeIssuerInAuthorizationResponses"),
};

const Scopes = z.array(z.strictObject({ value: z.string(), description: z.string().optional() }));

const API: Fields<Api> = {
  id: [({ identifier }) => Buffer.from(identifier).toString("hex")],
  name: [() => "an API", (_, name) => z.string().parse(name)],
  identifier: [({ identifier }) => identifier],
  signing_alg: [(api) => api.signingAlgorithm ?? "RS256", (_, algorithm) => z.literal("RS256").parse(algorithm)],
  allow_offline_access: onOff("allowOfflineAccess"),
  token_encryption: [(api) => api.encryptsTokens ? { format: "compact-nested-jwe" } : null],
  scopes: [
    (api) => api.permissions.map((value) => ({ value })),
    (api, scopes) => api.permissions = Scopes.parse(scopes).map(({ value }) => value),
  ],
  enforce_policies: [(api) => api.enableRbac],
  subject_type_authorization: [(api) => ({ user: { policy: api.userAccessPolicy ?? "allow_all" } })],
};

const CLIENT: Fields<Application> = {
  client_id: [({ clientId }) => clientId],
  name: [({ name }) => name],
  is_first_party: [({ party }) => party === "first-party"],
  external_client_id: [({ externalClientId }) => externalClientId],
  callbacks: [({ callbackUrls }) => callbackUrls],
  grant_types: [({ grantTypes }) => grantTypes],
};

const CONNECTION: Fields<TenantSettings["connections"][number]> = {
  id: [({ name }) => `con_${name}`],
  name: [({ name }) => name],
  strategy: [({ strategy = "auth0" }) => strategy],
  is_domain_connection: onOff("domainLevel"),
};

function show<T>(fields: Fields<T>, item: T): Record<string, unknown> {
  return Object.fromEntries(Object.entries(fields).map(([name, [show]]) => [name, show(item)]));
}

/** Applies the fields of a body to an item. */
function fill<T>(fields: Fields<T>, item: T, body: unknown): Json {
  for (const [name, value] of Object.entries(z.record(z.string(), z.unknown()).parse(body))) {
    const [, take] = fields[name] ?? [];
    if (!take) throw new Error(`Additional properties not allowed: ${name}`);
    take(item, value);
  }
  return show(fields, item);
}

const list = <T>(call: Call, fields: Fields<T>, items: T[], key?: string) =>
  page(call, items.map((item) => show(fields, item)), key);

/** A page of the items that match the query: an array, or an object that holds a total or the next page's start. */
function page({ query }: Call, items: Json[], key?: string): unknown {
  const wanted = (name: string) => query.get(name === "identifier" ? "identifiers" : name);
  const found = items.filter((item) =>
    Object.entries(item).every(([name, value]) => wanted(name) === null || wanted(name) === value)
  );
  const take = Number(query.get("take") ?? 0);
  const size = take || Number(query.get("per_page") ?? 50);
  const from = Number(query.get("from") ?? 0) + Number(query.get("page") ?? 0) * size;
  const part = found.slice(from, from + size);
  if (!key) return part;
  if (!take) return { [key]: part, total: found.length };
  return { [key]: part, ...(from + size < found.length && { next: String(from + size) }) };
}

function need<T>(item: T | undefined): T {
  if (!item) throw refusal(404, "not_found", "It does not exist");
  return item;
}

const change = <T>({ id, body }: Call, fields: Fields<T>, items: T[]) =>
  fill(fields, need(items.find((item) => show(fields, item).id === id)), body);

// ------------------------------------------------------------------------------------- APIs, grants and clients

function createApi({ settings, body }: Call): Json {
  const { identifier, ...rest } = z.looseObject({ name: z.string(), identifier: z.string() }).parse(body);
  const isTaken = settings.apis.some((api) => api.identifier === identifier);
  if (isTaken) throw refusal(409, "resource_server_conflict", "A resource server with the same identifier exists");
  const api = { identifier, allowOfflineAccess: false, accessTokenProfile: "auth0" as const, enableRbac: false };
  settings.apis.push({ ...api, permissions: [] });
  return fill(API, need(settings.apis.at(-1)), rest);
}

const Grant = z.strictObject({
  audience: z.string(),
  default_for: z.literal("third_party_clients"),
  subject_type: z.literal("user"),
  scope: z.array(z.string()),
});

const grantsOf = ({ apis, applications }: TenantSettings): Json[] =>
  apis.flatMap(({ identifier: audience, defaultPermissionsForThirdPartyApplications: scope }) => [
    ...(scope ? [{ audience, default_for: "third_party_clients", subject_type: "user", scope }] : []),
    ...applications.filter(({ userDelegatedApis }) => userDelegatedApis?.includes(audience))
      .map(({ clientId }) => ({ audience, client_id: clientId, subject_type: "user", allow_all_scopes: true })),
  ]);

function createGrant({ settings, body }: Call): Json {
  const grant = Grant.parse(body);
  const api = need(settings.apis.find(({ identifier }) => identifier === grant.audience));
  if (api.defaultPermissionsForThirdPartyApplications) throw refusal(409, "client_grant_conflict", "It exists");
  api.defaultPermissionsForThirdPartyApplications = grant.scope;
  return grant;
}

async function importClient({ settings, body, importFromUrl }: Call): Promise<Json> {
  const { external_client_id: url } = z.strictObject({ external_client_id: z.url() }).parse(body);
  if (!settings.clientIdMetadataDocumentRegistration) {
    throw refusal(403, "feature_not_enabled", "Client ID Metadata Document Registration is not enabled");
  }
  if (settings.applications.some(({ externalClientId }) => externalClientId === url)) return {};
  if (settings.applications.length >= settings.applicationLimit) {
    throw refusal(403, "too_many_entities", "You reached the limit of entities of this type for this tenant");
  }
  await importFromUrl(url);
  return {};
}

// ----------------------------------------------------------------------------------------------------- Actions

/** Actions → Library. */
export interface StoredAction {
  id: string;
  name: string;
  code: string;
  deployed_version?: { code: string };
  /** How many more times it has to be read until it is built. */
  building?: number;
}

/** Actions → Triggers → post-login. */
export interface StoredBinding {
  id: string;
  display_name: string;
  action: { id: string };
}

const NewAction = z.strictObject({
  name: z.string(),
  code: z.string(),
  supported_triggers: z.tuple([z.strictObject({ id: z.literal("post-login"), version: z.literal("v3") })]),
  runtime: z.literal("node22"),
});

const Bindings = z.array(z.strictObject({
  ref: z.strictObject({ type: z.enum(["binding_id", "action_id"]), value: z.string() }),
  display_name: z.string(),
}));

/** Where a test sets only `postLoginAction`, the Action is deployed and in the flow, as after Step 4. */
function library(settings: TenantSettings): { actions: StoredAction[]; flow: StoredBinding[] } {
  const name = "Add Scopes for ChatGPT";
  const ours = { id: "act_ours", name, code: ACTION_CODE, deployed_version: { code: ACTION_CODE } };
  const {
    postLoginAction,
    actions = postLoginAction ? [ours] : [],
    flow = postLoginAction ? [{ id: "bnd_ours", action: { id: ours.id }, display_name: name }] : [],
  } = settings;
  return { actions, flow };
}

const showAction = ({ building = 0, ...action }: StoredAction): Json => ({
  ...action,
  status: building > 0 ? "pending" : "built",
  all_changes_deployed: action.code === action.deployed_version?.code,
});

const findAction = (settings: TenantSettings, id: string) =>
  need(library(settings).actions.find((action) => action.id === id));

function readAction({ settings, id }: Call): Json {
  const action = findAction(settings, id);
  const shown = showAction(action);
  if (action.building) action.building--;
  return shown;
}

function createAction({ settings, body }: Call): Json {
  const action = { id: randomUUID(), building: 2, ...NewAction.parse(body) };
  const { actions } = library(settings);
  if (actions.some(({ name }) => name === action.name)) throw refusal(409, "already_exists", "The name is taken");
  settings.actions = [...actions, action];
  return showAction(action);
}

function deployAction({ settings, id }: Call): Json {
  const action = findAction(settings, id);
  if (action.building) throw refusal(400, "invalid_action", "The action is not built.");
  action.deployed_version = { code: action.code };
  setPostLoginAction(settings);
  return action.deployed_version;
}

function updateBindings({ settings, body }: Call): Json {
  const { flow } = library(settings);
  const { bindings } = z.strictObject({ bindings: Bindings }).parse(body);
  settings.flow = bindings.map(({ ref: { type, value: id }, display_name }) => {
    if (type === "binding_id") return need(flow.find((binding) => binding.id === id));
    if (findAction(settings, id).deployed_version) return { id: randomUUID(), display_name, action: { id } };
    throw refusal(400, "not_deployed", "The action is not deployed.");
  });
  setPostLoginAction(settings);
  return { bindings: settings.flow };
}

/** A sign-in runs what is deployed and in the flow. The tenant can run this project's Action and no other. */
function setPostLoginAction(settings: TenantSettings): void {
  const { actions, flow } = library(settings);
  const isOurs = ({ id }: StoredAction) => flow.some(({ action }) => action.id === id);
  settings.postLoginAction = actions.filter(isOurs).some((action) => action.deployed_version?.code === ACTION_CODE);
}
