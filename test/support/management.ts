/**
 * The part of Auth0's Management API that `npm run setup` uses, on the settings of the stand-in tenant: what is
 * written here decides how the tenant's other endpoints answer.
 *
 * NOT FOR PRODUCTION: tokens are plain names. Paths, fields and errors are those of Auth0's SDK (npm `auth0` 7.1);
 * what else it answers, and the words that nobody has quoted, are this file's own. Left out: rate limits, and every
 * field that setup does not look at.
 */
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { z } from "zod";
import type { Api, Application, TenantSettings } from "./tenant-settings.ts";

export const ACTION_CODE = readFileSync(new URL("../../auth0-action.js", import.meta.url), "utf8");

/** As Dashboard → Applications → APIs → Auth0 Management API → API Explorer gives out: with all that setup needs. */
export const MANAGEMENT_SCOPES = (
  "read:tenant_settings update:tenant_settings read:resource_servers create:resource_servers update:resource_servers " +
  "read:client_grants create:client_grants read:clients create:clients read:connections update:connections " +
  "read:actions create:actions update:actions"
).split(" ");

class ManagementError extends Error {
  readonly status: number;
  readonly code: string;

  constructor(status: number, code: string, message: string) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const REASONS: Record<number, string> = {
  400: "Bad Request",
  401: "Unauthorized",
  403: "Forbidden",
  404: "Not Found",
  409: "Conflict",
};

/** What a request is answered with: the body, and the status where it is not 200. */
type Answer = [body: unknown, status?: number];

interface Call {
  settings: TenantSettings;
  query: URLSearchParams;
  /** What stands in the path for `{id}`. */
  id: string;
  body: unknown;
  importFromUrl: (url: string) => Promise<void>;
}

/** Each route of the API: the scope that it asks of the token, and what it does. */
const ROUTES: Record<string, [scope: string, answer: (call: Call) => Answer | Promise<Answer>]> = {
  "GET resource-servers": ["read:resource_servers", listApis],
  "POST resource-servers": ["create:resource_servers", createApi],
  "PATCH resource-servers/{id}": ["update:resource_servers", updateApi],
  "GET client-grants": ["read:client_grants", listGrants],
  "POST client-grants": ["create:client_grants", createGrant],
  "GET tenants/settings": ["read:tenant_settings", ({ settings }) => [tenantSettings(settings)]],
  "PATCH tenants/settings": ["update:tenant_settings", updateTenant],
  "GET clients": ["read:clients", listClients],
  "POST clients/cimd/register": ["create:clients", importClient],
  "GET connections": ["read:connections", listConnections],
  "PATCH connections/{id}": ["update:connections", updateConnection],
  "GET actions/actions": ["read:actions", listActions],
  "GET actions/actions/{id}": ["read:actions", readAction],
  "POST actions/actions": ["create:actions", createAction],
  "POST actions/actions/{id}/deploy": ["update:actions", deployAction],
  "GET actions/triggers/post-login/bindings": ["read:actions", listBindings],
  "PATCH actions/triggers/post-login/bindings": ["update:actions", updateBindings],
};

/** @param request Method, URL and body of a request under `/api/v2/`. */
export async function answerManagement(
  settings: TenantSettings,
  importFromUrl: Call["importFromUrl"],
  request: { method: string; url: URL; authorization: string; body: string },
): Promise<Response> {
  try {
    const [body, status = 200] = await route(settings, importFromUrl, request);
    return Response.json(body, { status });
  } catch (error) {
    const { status, code, message } = error instanceof ManagementError
      ? error
      : new ManagementError(400, "invalid_body", `Payload validation error: '${String(error)}'`);
    const body = { statusCode: status, error: REASONS[status], message, errorCode: code };
    return Response.json(body, { status });
  }
}

function route(
  settings: TenantSettings,
  importFromUrl: Call["importFromUrl"],
  { method, url, authorization, body }: Parameters<typeof answerManagement>[2],
): Answer | Promise<Answer> {
  const path = url.pathname.replace("/api/v2/", "");
  for (const [name, [scope, answer]] of Object.entries(ROUTES)) {
    const [, pattern = ""] = name.split(" ");
    const match = new RegExp(`^${pattern.replace("{id}", "(?<id>[^/]+)")}$`).exec(path);
    if (!match || !name.startsWith(`${method} `)) continue;
    const scopes = settings.managementTokens?.[authorization.replace("Bearer ", "")];
    if (!scopes) throw new ManagementError(401, "invalid_token", "Invalid token");
    if (!scopes.includes(scope)) {
      throw new ManagementError(403, "insufficient_scope", `Insufficient scope, expected any of: ${scope}`);
    }
    const id = decodeURIComponent(match.groups?.id ?? "");
    return answer({
      settings,
      query: url.searchParams,
      id,
      body: body ? JSON.parse(body) : undefined,
      importFromUrl,
    });
  }
  throw new ManagementError(404, "not_found", "Not Found");
}

// -------------------------------------------------------------------------------------------------- paging

/** By number: an array, or with `include_totals` (or where there is no other form) an object that holds it. */
function pageByNumber(items: unknown[], query: URLSearchParams, key: string, isObject = false): Answer {
  const per_page = Math.min(Number(query.get("per_page") ?? 20), 50);
  const page = Number(query.get("page") ?? 0);
  const part = items.slice(page * per_page, (page + 1) * per_page);
  return isObject || query.get("include_totals") === "true"
    ? [{ [key]: part, total: items.length, page, per_page }]
    : [part];
}

/** By `take`, and then from where `next` says. */
function pageByNext(items: unknown[], query: URLSearchParams, key: string): Answer {
  const from = Number(query.get("from") ?? 0);
  const take = Number(query.get("take") ?? 50);
  const isLast = from + take >= items.length;
  return [{ [key]: items.slice(from, from + take), ...(!isLast && { next: String(from + take) }) }];
}

// ---------------------------------------------------------------------------------------- APIs and client grants

const Scopes = z.array(z.strictObject({ value: z.string(), description: z.string().optional() }));

function listApis({ settings, query }: Call): Answer {
  const wanted = query.getAll("identifiers");
  const apis = settings.apis.filter(({ identifier }) => wanted.length === 0 || wanted.includes(identifier));
  return pageByNumber(apis.map(describeApi), query, "resource_servers");
}

const apiId = ({ identifier }: Api) => Buffer.from(identifier).toString("hex");

const describeApi = (api: Api) => ({
  id: apiId(api),
  identifier: api.identifier,
  signing_alg: api.signingAlgorithm ?? "RS256",
  allow_offline_access: api.allowOfflineAccess,
  token_encryption: api.encryptsTokens ? { format: "compact-nested-jwe" } : null,
  scopes: api.permissions.map((value) => ({ value })),
  enforce_policies: api.enableRbac,
  token_dialect: api.accessTokenProfile === "rfc9068" ? "rfc9068_profile" : "access_token",
  subject_type_authorization: { user: { policy: api.userAccessPolicy ?? "allow_all" } },
});

function createApi({ settings, body }: Call): Answer {
  const { identifier, allow_offline_access, scopes } = z.strictObject({
    name: z.string(),
    identifier: z.string(),
    signing_alg: z.literal("RS256"),
    allow_offline_access: z.boolean(),
    scopes: Scopes,
  }).parse(body);
  if (settings.apis.some((api) => api.identifier === identifier)) {
    throw new ManagementError(409, "resource_server_conflict", "A resource server with the same identifier exists");
  }
  const api: Api = {
    identifier,
    allowOfflineAccess: allow_offline_access,
    accessTokenProfile: "auth0",
    permissions: scopes.map(({ value }) => value),
    enableRbac: false,
  };
  settings.apis.push(api);
  return [describeApi(api), 201];
}

function updateApi({ settings, id, body }: Call): Answer {
  const api = settings.apis.find((one) => apiId(one) === id);
  if (!api) {
    throw new ManagementError(404, "inexistent_resource_server", "The resource server does not exist");
  }
  const change = z.strictObject({ allow_offline_access: z.boolean(), scopes: Scopes }).partial().parse(body);
  api.allowOfflineAccess = change.allow_offline_access ?? api.allowOfflineAccess;
  api.permissions = change.scopes?.map(({ value }) => value) ?? api.permissions;
  return [describeApi(api)];
}

function listGrants({ settings, query }: Call): Answer {
  const audience = query.get("audience");
  const grants = settings.apis.filter(({ identifier }) => audience === null || identifier === audience)
    .flatMap(({ identifier, defaultPermissionsForThirdPartyApplications: scope }) => [
      ...(scope ? [{ audience: identifier, default_for: "third_party_clients", scope }] : []),
      ...settings.applications.filter(({ userDelegatedApis }) => userDelegatedApis?.includes(identifier))
        .map(({ clientId }) => ({ audience: identifier, client_id: clientId, allow_all_scopes: true })),
    ])
    .filter((grant) =>
      ["default_for", "client_id"].every((name) =>
        query.get(name) === null || query.get(name) === (grant as Record<string, unknown>)[name]
      )
    )
    .map((grant, number) => ({ id: `cgr_${number}`, subject_type: "user", ...grant }));
  return pageByNext(grants, query, "client_grants");
}

function createGrant({ settings, body }: Call): Answer {
  const grant = z.strictObject({
    audience: z.string(),
    default_for: z.literal("third_party_clients"),
    subject_type: z.literal("user"),
    scope: z.array(z.string()),
  }).parse(body);
  const api = settings.apis.find(({ identifier }) => identifier === grant.audience);
  if (!api) {
    throw new ManagementError(404, "inexistent_resource_server", "The resource server does not exist");
  }
  if (api.defaultPermissionsForThirdPartyApplications) {
    throw new ManagementError(409, "client_grant_conflict", "A grant for this audience exists");
  }
  api.defaultPermissionsForThirdPartyApplications = grant.scope;
  return [{ id: "cgr_0", ...grant }, 201];
}

// ------------------------------------------------------------------------------------------ tenant and clients

const tenantSettings = (settings: TenantSettings) => ({
  default_audience: settings.defaultAudience,
  resource_parameter_profile: settings.resourceParameterCompatibilityProfile ? "compatibility" : "audience",
  flags: { enable_dynamic_client_registration: settings.dynamicClientRegistration },
  dynamic_client_registration_security_mode: settings.kind,
  client_id_metadata_document_supported: settings.clientIdMetadataDocumentRegistration,
  authorization_response_iss_parameter_supported: settings.includeIssuerInAuthorizationResponses,
});

function updateTenant({ settings, body }: Call): Answer {
  const change = z.strictObject({
    default_audience: z.string(),
    flags: z.strictObject({ enable_dynamic_client_registration: z.boolean() }),
    client_id_metadata_document_supported: z.boolean(),
    authorization_response_iss_parameter_supported: z.boolean(),
  }).partial().parse(body);
  const audience = change.default_audience ?? settings.defaultAudience;
  if (audience && !settings.apis.some(({ identifier }) => identifier === audience)) {
    throw new ManagementError(400, "invalid_body", `default_audience: no API is ${audience}`);
  }
  settings.defaultAudience = audience;
  settings.dynamicClientRegistration = change.flags?.enable_dynamic_client_registration ??
    settings.dynamicClientRegistration;
  settings.clientIdMetadataDocumentRegistration = change.client_id_metadata_document_supported ??
    settings.clientIdMetadataDocumentRegistration;
  settings.includeIssuerInAuthorizationResponses = change.authorization_response_iss_parameter_supported ??
    settings.includeIssuerInAuthorizationResponses;
  return [tenantSettings(settings)];
}

function listClients({ settings, query }: Call): Answer {
  const documentUrl = query.get("external_client_id");
  const hidden = query.get("include_fields") === "false" ? query.get("fields")?.split(",") ?? [] : [];
  const clients = settings.applications
    .filter(({ externalClientId }) => documentUrl === null || externalClientId === documentUrl)
    .map((application) => ({
      client_id: application.clientId,
      name: application.name,
      is_first_party: application.party === "first-party",
      ...(application.party !== "first-party" && { third_party_security_mode: application.party }),
      ...(application.externalClientId && { external_client_id: application.externalClientId }),
      ...(!hidden.includes("client_secret") && { client_secret: application.clientSecret }),
      callbacks: application.callbackUrls,
      grant_types: application.grantTypes,
    }));
  return pageByNumber(clients, query, "clients");
}

async function importClient({ settings, body, importFromUrl }: Call): Promise<Answer> {
  const { external_client_id: url } = z.strictObject({ external_client_id: z.url() }).parse(body);
  const find = (): Application | undefined => settings.applications.find((one) => one.externalClientId === url);
  const known = find();
  if (!settings.clientIdMetadataDocumentRegistration) {
    throw new ManagementError(403, "feature_not_enabled", "Client ID Metadata Document Registration is not enabled");
  }
  if (!known && settings.applications.length >= settings.applicationLimit) {
    const message = "You reached the limit of entities of this type for this tenant";
    throw new ManagementError(403, "too_many_entities", message);
  }
  try {
    if (!known) await importFromUrl(url);
  } catch {
    throw new ManagementError(400, "invalid_client_metadata", `The document ${url} cannot be used`);
  }
  return [
    { client_id: find()?.clientId, validation: { valid: true, violations: [], warnings: [] } },
    known ? 200 : 201,
  ];
}

// ------------------------------------------------------------------------------------------------- connections

const describeConnection = ({ name, domainLevel, strategy = "auth0" }: TenantSettings["connections"][number]) => ({
  id: `con_${name}`,
  name,
  strategy,
  is_domain_connection: domainLevel,
});

function listConnections({ settings, query }: Call): Answer {
  return pageByNext(settings.connections.map(describeConnection), query, "connections");
}

function updateConnection({ settings, id, body }: Call): Answer {
  const connection = settings.connections.find(({ name }) => `con_${name}` === id);
  if (!connection) throw new ManagementError(404, "inexistent_connection", "The connection does not exist");
  connection.domainLevel = z.strictObject({ is_domain_connection: z.boolean() }).parse(body).is_domain_connection;
  return [describeConnection(connection)];
}

// ----------------------------------------------------------------------------------------------------- Actions

/** Actions → Library. */
export interface StoredAction {
  id: string;
  name: string;
  code: string;
  /** Left out: never deployed. */
  deployedCode?: string;
  /** How often it is still to be asked for until it is built. */
  building?: number;
}

/** Actions → Triggers → post-login. */
export interface StoredBinding {
  id: string;
  actionId: string;
  displayName: string;
}

/** Where a test has set `postLoginAction` alone, the Action is there as Step 4 leaves it. */
function library(settings: TenantSettings): { actions: StoredAction[]; flow: StoredBinding[] } {
  const name = "Add Scopes for ChatGPT";
  const ours = { id: "act_ours", name, code: ACTION_CODE, deployedCode: ACTION_CODE };
  const {
    postLoginAction,
    actions = postLoginAction ? [ours] : [],
    flow = postLoginAction ? [{ id: "bnd_ours", actionId: ours.id, displayName: name }] : [],
  } = settings;
  return { actions, flow };
}

const describeAction = ({ id, name, code, deployedCode, building = 0 }: StoredAction) => ({
  id,
  name,
  code,
  supported_triggers: [{ id: "post-login", version: "v3" }],
  status: building > 0 ? "pending" : "built",
  all_changes_deployed: code === deployedCode,
  ...(deployedCode !== undefined && { deployed_version: { code: deployedCode, deployed: true } }),
});

function findAction({ settings, id }: Pick<Call, "settings" | "id">): StoredAction {
  const action = library(settings).actions.find((one) => one.id === id);
  if (!action) throw new ManagementError(404, "not_found", "That action does not exist.");
  return action;
}

function listActions({ settings, query }: Call): Answer {
  const wanted = query.get("actionName");
  const actions = library(settings).actions.filter(({ name }) => wanted === null || name === wanted);
  return pageByNumber(actions.map(describeAction), query, "actions", true);
}

function readAction(call: Call): Answer {
  const action = findAction(call);
  const answer: Answer = [describeAction(action)];
  if (action.building) action.building--;
  return answer;
}

function createAction({ settings, body }: Call): Answer {
  const { name, code } = z.strictObject({
    name: z.string(),
    supported_triggers: z.tuple([z.strictObject({ id: z.literal("post-login"), version: z.literal("v3") })]),
    code: z.string(),
    runtime: z.literal("node22"),
  }).parse(body);
  const { actions } = library(settings);
  if (actions.some((one) => one.name === name)) {
    throw new ManagementError(409, "already_exists", "An action with that name exists.");
  }
  const action = { id: `act_${randomUUID()}`, name, code, building: 2 };
  settings.actions = [...actions, action];
  return [describeAction(action), 201];
}

function deployAction(call: Call): Answer {
  const action = findAction(call);
  if (action.building) throw new ManagementError(400, "invalid_action", "The action is not built.");
  action.deployedCode = action.code;
  setPostLoginAction(call.settings);
  return [{ id: randomUUID(), code: action.code, deployed: true }, 202];
}

const describeBinding = (settings: TenantSettings) => ({ id, actionId, displayName }: StoredBinding) => ({
  id,
  trigger_id: "post-login",
  display_name: displayName,
  action: describeAction(findAction({ settings, id: actionId })),
});

function listBindings({ settings, query }: Call): Answer {
  return pageByNumber(library(settings).flow.map(describeBinding(settings)), query, "bindings", true);
}

function updateBindings({ settings, body }: Call): Answer {
  const { bindings } = z.strictObject({
    bindings: z.array(z.strictObject({
      ref: z.strictObject({ type: z.enum(["binding_id", "action_id"]), value: z.string() }),
      display_name: z.string(),
    })),
  }).parse(body);
  const { flow } = library(settings);
  settings.flow = bindings.map(({ ref: { type, value }, display_name: displayName }) => {
    const known = type === "binding_id" ? flow.find(({ id }) => id === value) : undefined;
    const action = findAction({ settings, id: known?.actionId ?? value });
    if (action.deployedCode === undefined) {
      throw new ManagementError(400, "not_deployed", "The action is not deployed.");
    }
    return { id: known?.id ?? `bnd_${randomUUID()}`, actionId: action.id, displayName };
  });
  setPostLoginAction(settings);
  return [{ bindings: settings.flow.map(describeBinding(settings)) }];
}

/** What runs at a sign-in is what is deployed and in the flow. The tenant knows this project's Action and no other. */
function setPostLoginAction(settings: TenantSettings): void {
  const { actions, flow } = library(settings);
  settings.postLoginAction = actions.some(({ id, deployedCode }) =>
    deployedCode === ACTION_CODE && flow.some(({ actionId }) => actionId === id)
  );
}
